"""`ochat represent`: does a model tell the classes of conversations apart inside?"""
