"""What `retrieve` and `ike` share: finding the edits that a question is about, and putting text in front of it."""
