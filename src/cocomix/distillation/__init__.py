"""What a teacher predicts at each token, for students that are to predict the same (Hinton et al., 2015)."""
