"""What runs tasks: containers, plain commands, pretence."""
