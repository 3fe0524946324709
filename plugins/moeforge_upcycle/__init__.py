"""`moeforge upcycle`: a dense checkpoint becomes a mixture of experts, exactly where that is possible."""
