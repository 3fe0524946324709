"""`moeforge push`: publish an artifact with a model card made from its lineage."""
