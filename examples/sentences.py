"""Sentences to embed: several topics, paraphrases of one another, short and long ones; and queries about them."""

from __future__ import annotations

SENTENCES = (
    # Each pair says the same in other words.
    "A man is playing the guitar on a crowded street.",
    "Someone performs music with a guitar in front of passers-by.",
    "The central bank raised interest rates by half a percentage point.",
    "Borrowing became more expensive after the monetary authority lifted its key rate by 0.5 %.",
    "Heavy rain flooded several villages along the river last night.",
    "Overnight downpours left a number of riverside settlements under water.",
    "The vaccine reduced the number of severe cases among older patients.",
    "Fewer elderly people fell seriously ill once they had been immunised.",
    "How can I reverse a list in Python?",
    "What is the way to turn a Python list around?",
    "The goalkeeper saved a penalty in the last minute of the final.",
    "A late spot kick was stopped by the keeper, and the cup was theirs.",
    "Astronomers found a planet the size of Earth around a nearby star.",
    "A world about as large as ours has been discovered orbiting one of our stellar neighbours.",
    "Simmer the tomatoes with garlic and basil for twenty minutes.",
    "Cook the sauce of tomatoes, basil and garlic gently for a third of an hour.",
    "My flight was cancelled and the airline gave me a hotel voucher.",
    "The carrier put me up for the night after my plane did not leave.",
    "The museum shows paintings that were stolen during the war.",
    "Looted wartime art is on display in the gallery.",
    "She adopted a small grey kitten from the shelter.",
    "A tiny cat found a new home with her after living in a rescue centre.",
    # Alone in what they say.
    "Hello!",
    "Snow.",
    "It depends.",
    "Bees navigate by the position of the sun.",
    "The contract ends on 31 December unless both parties renew it in writing.",
    "Electric cars lose some of their range in cold weather.",
    "He repaired the old clock that had been silent for thirty years.",
    "Please send me the invoice before Friday.",
    "The trees along the avenue were planted in 1890.",
    "A marathon is a little over forty-two kilometres long.",
    "Children learn a second language faster than adults do.",
    "The new bridge cut the journey between the two towns from an hour to ten minutes.",
    "Quantized weights take a quarter of the memory of float32 ones.",
    "The orchestra opened the season with a symphony that its composer never heard.",
    "Our server was unreachable for two hours because a certificate had expired.",
    "The volcano had been quiet for three centuries when it erupted.",
    # Long ones.
    "Photosynthesis is the process by which plants, algae and some bacteria turn sunlight, water and carbon dioxide "
    "into sugar and oxygen; it feeds almost every living thing on the planet, directly or through the animals that eat "
    "plants, and it filled the air with the oxygen that made larger animals possible in the first place.",
    "When the library moved into the former railway station, the architects kept the iron columns and the clock above "
    "the ticket hall, put the reading rooms where the platforms had been, and laid a garden over the tracks. Readers "
    "complained at first about the echo under the high roof, so felt panels were hung between the columns. Today more "
    "than two thousand people visit on an ordinary Saturday, many of whom borrow no book at all but come to work, "
    "to meet someone, to hear a talk or simply to sit under the old clock and watch the light change.",
)

QUERIES = (
    "rescued pet",
    "how do I flip the order of a list?",
    "mortgages will cost more",
    "a new exoplanet",
    "recipe for pasta sauce",
    "why was the website down?",
)
