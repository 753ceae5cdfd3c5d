"""libzmq as an attacker uses it: whatever key, many parts, no limits. By ctypes, no other package."""
import ctypes
import ctypes.util
import pathlib

DEALER, LINGER, SNDTIMEO, SNDHWM, CONNECT_TIMEOUT = 5, 17, 28, 23, 79
CURVE_PUBLIC, CURVE_SECRET, CURVE_SERVER = 48, 49, 50
MAX_SOCKETS, DONTWAIT, SNDMORE = 2, 1, 2

_path = ctypes.util.find_library("zmq") or "libzmq.so.5"
Z = ctypes.CDLL(_path, use_errno=True)
for _name in ("zmq_ctx_new", "zmq_socket"):
    getattr(Z, _name).restype = ctypes.c_void_p
Z.zmq_socket.argtypes = [ctypes.c_void_p, ctypes.c_int]
Z.zmq_setsockopt.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
Z.zmq_connect.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
Z.zmq_send.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
Z.zmq_close.argtypes = [ctypes.c_void_p]
Z.zmq_ctx_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
Z.zmq_z85_encode.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
Z.zmq_z85_encode.restype = ctypes.c_char_p
Z.zmq_z85_decode.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
Z.zmq_curve_keypair.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
Z.zmq_curve_public.argtypes = [ctypes.c_char_p, ctypes.c_char_p]

CONTEXT = Z.zmq_ctx_new()
Z.zmq_ctx_set(CONTEXT, MAX_SOCKETS, 8192)


def _raw(z85):
    out = ctypes.create_string_buffer(32)
    Z.zmq_z85_decode(out, z85)
    return out.raw


def new_key():
    public, secret = ctypes.create_string_buffer(41), ctypes.create_string_buffer(41)
    Z.zmq_curve_keypair(public, secret)
    return _raw(public.value), _raw(secret.value)


def key_of(state):
    """The CURVE pair of a node's folder: a thief's, or the node's own."""
    secret = (pathlib.Path(state) / "curve.key").read_bytes()[8:40]
    text, public = ctypes.create_string_buffer(41), ctypes.create_string_buffer(41)
    Z.zmq_z85_encode(text, secret, 32)
    Z.zmq_curve_public(public, text)
    return _raw(public.value), secret


class Dealer:
    def __init__(self, port, server_key, key, source="127.0.0.1"):
        self.socket = Z.zmq_socket(CONTEXT, DEALER)
        for option, value in ((LINGER, 0), (SNDTIMEO, 0), (SNDHWM, 1000000)):
            number = ctypes.c_int(value)
            Z.zmq_setsockopt(self.socket, option, ctypes.byref(number), 4)
        for option, value in ((CURVE_SERVER, server_key), (CURVE_PUBLIC, key[0]),
                              (CURVE_SECRET, key[1])):
            Z.zmq_setsockopt(self.socket, option, value, 32)
        Z.zmq_connect(self.socket, f"tcp://{source}:0;127.0.0.1:{port}".encode())

    def send(self, data, more=False):
        return Z.zmq_send(self.socket, data, len(data), DONTWAIT | (SNDMORE if more else 0)) >= 0

    def close(self):
        if self.socket is not None:
            Z.zmq_close(self.socket)
        self.socket = None
