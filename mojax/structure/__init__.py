"""What a traced program says: who absorbs a scale, what is out of reach, which axes are cut together."""
