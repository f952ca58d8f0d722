"""Docker's routes for containers, images, volumes and processes in containers, with one module per resource."""
