"""Social IQa (arXiv:1904.09728): what people feel, want or do next."""

from .commonsense import CommonsenseTask


class SocialIqaTask(CommonsenseTask):
    """A situation, a question and three answers."""

    name = "social_i_qa"
    choices = ("answer1", "answer2", "answer3", "answer4", "answer5")
