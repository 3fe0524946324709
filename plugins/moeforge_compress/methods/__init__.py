"""One file a method. Each is a codec: what it stores for a matrix, how it makes it, how it reads it back."""
