"""What is known of a base: its sites, wrappers, devices and locks."""
