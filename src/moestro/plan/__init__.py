"""What a mixture costs before anything is loaded: parameters, FLOPs, memory, speed, price."""
