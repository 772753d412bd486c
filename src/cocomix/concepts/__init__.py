"""Which concepts a frozen teacher used at each token: tap, encode, attribute, label."""
