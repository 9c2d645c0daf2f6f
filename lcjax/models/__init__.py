"""One decoder (`decoder.Decoder`) described by data (`spec.ModelSpec`); a family is a spec and a name map."""
