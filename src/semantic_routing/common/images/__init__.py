"""Safe decoding of picture files to the pixels that viewers show, and saving of images."""
