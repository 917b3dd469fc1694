"One file a command, named as typed. What libraries warn of while they are loaded is not for who types one."
import warnings

warnings.filterwarnings('ignore', category=FutureWarning, module='torch')
