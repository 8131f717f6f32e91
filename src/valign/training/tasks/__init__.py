"""What is trained: image pairs, value pairs, erased concepts, labelled rows, the guard's head."""
