"""One page about an artifact: everything in it, nothing fetched, readable in light and dark and without a mouse."""
