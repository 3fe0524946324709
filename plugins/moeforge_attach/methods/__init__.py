"""One file a method: what it declares."""
