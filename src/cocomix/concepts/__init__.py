"""Extract the concepts that a frozen teacher uses at each token: tap, encode, attribute, label."""
