"""`moeforge compress`: the same network in fewer bits, experts included, with a table that shows where every byte went."""
