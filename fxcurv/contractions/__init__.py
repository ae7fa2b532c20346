"""P in factored form, and the ways to reduce it."""
