"""A learned order of revealing tokens and their stages, inside a valid bound, against the orders that are given."""
