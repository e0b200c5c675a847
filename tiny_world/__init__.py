"""Make and evaluate the embedded model of the drawn world."""
