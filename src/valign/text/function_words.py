"""English words that carry no content by themselves: articles, pronouns, prepositions, conjunctions, auxiliaries."""

FUNCTION_WORDS = frozenset({
    "a", "an", "the", "this", "that", "these", "those", "some", "any", "each", "every", "no", "not", "all", "both", "such",
    "same", "other", "another", "one", "two", "three", "i", "you", "he", "she", "it", "we", "they", "me", "him", "her", "us",
    "them", "my", "your", "his", "its", "our", "their", "mine", "yours", "hers", "ours", "theirs", "himself", "herself",
    "itself", "themselves", "who", "whom", "whose", "which", "what", "where", "when", "why", "how", "of", "in", "on", "at",
    "by", "for", "with", "about", "against", "between", "into", "through", "during", "before", "after", "above", "below",
    "to", "from", "up", "down", "out", "off", "over", "under", "again", "then", "once", "here", "there", "and", "but", "or",
    "nor", "so", "yet", "if", "because", "as", "until", "while", "than", "too", "very", "can", "will", "just", "should",
    "would", "could", "may", "might", "must", "shall", "am", "is", "are", "was", "were", "be", "been", "being", "have", "has",
    "had", "having", "do", "does", "did", "doing", "s", "t", "don", "won", "near", "beside", "behind", "across", "along",
    "around", "inside", "outside", "upon", "onto", "toward", "towards", "within", "without", "like", "amid", "among",
})  # fmt: skip
