"""What is known of somebody else's model: its sites, wrappers, devices and locks."""
