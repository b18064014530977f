"""What computes tokens: one file or folder an engine, beside the protocol they share."""
