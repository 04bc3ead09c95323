"""Arrays in, arrays out: the mathematics of every axis, without Flax."""
