"""The world of words: the toy world's pictures under captions of hundreds of words, a third of them held out."""
