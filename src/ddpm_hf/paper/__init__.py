"""The figures and tables of the paper, and of an article that introduces it, from a model and a data set."""
