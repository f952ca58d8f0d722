"""Docker's routes for containers, images, volumes and processes in containers; one module per resource."""
