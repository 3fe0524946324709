"""One file a method; see moeforge_upcycle.recipe for what a method declares."""
