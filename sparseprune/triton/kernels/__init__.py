"""Device code. Importing a module of this folder imports Triton: only launches and the ahead-of-time compiler do so."""
