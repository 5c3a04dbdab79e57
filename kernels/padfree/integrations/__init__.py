"""padfree inside other libraries: each module without an underscore is imported explicitly and needs the library it names.

It may import the entry points of padfree; nothing in padfree imports it.
"""
