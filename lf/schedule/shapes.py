Shapes = object
def key(b): return 0
def trace(l,b,c): raise NotImplementedError
