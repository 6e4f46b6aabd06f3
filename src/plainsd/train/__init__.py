"""Training: what is trained (a method), what it is trained on (data), and one loop for all of them."""
