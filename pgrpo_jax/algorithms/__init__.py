"""Floor 0: pure maths, arrays in and arrays out; only jax and chex."""
