"""What the paper computes, one file an equation."""
