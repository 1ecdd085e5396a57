"""The world of words: the toy world's images with captions from a vocabulary of hundreds of words, a third held out."""
