"""A plugin of SkyPilot's API server for a machine without internet.

Before each look at a job's status the jobs controller asks whether two public addresses answer, and does not look while
neither does. SkyPilot itself stays as it is: it loads this through its own hook, `~/.sky/plugins.yaml`.
"""

from sky.server import plugins


class Offline(plugins.BasePlugin):
    def __init__(self, url: str):
        self._url = url

    def install(self, extension_context):
        from sky.backends import backend_utils

        backend_utils._TEST_IP_LIST = [self._url]
