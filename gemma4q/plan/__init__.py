"""How a forward pass is computed: ops over buffers, laid out once, packed into the records every executor reads."""
