"""Before step 0: do all ranks of a run agree in what they are made of."""
