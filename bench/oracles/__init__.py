"""Other programs' own published code, run as it is over a small model of ours, and compared with plainsd."""
