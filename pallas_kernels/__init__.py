"""Array operations with an implementation per kind of device; arrays in, arrays out."""
