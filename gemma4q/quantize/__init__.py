"""Models made smaller: how blocks are found, which tensor gets which, and the file that comes of it."""
