"""Floor 8: other libraries, each imported only when its functions are called."""
