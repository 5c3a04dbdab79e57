"""padfree inside other libraries; each module here is imported explicitly and needs the library it names."""
