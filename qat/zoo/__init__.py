"""The small models, data modules and tasks that the shipped configs name."""
