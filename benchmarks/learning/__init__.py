"""Does training on the tables teach a policy anything that held-out pairs show?"""
