"""What measures read: encoders, images, annotations."""
