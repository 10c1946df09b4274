"""Many runs over a grid of settings, and what can be concluded from them."""
