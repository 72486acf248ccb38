"""What the three processes must agree on; nothing one of them could change alone."""
