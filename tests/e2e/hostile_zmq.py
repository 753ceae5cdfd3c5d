"""libzmq as an attacker uses it: whatever key, many parts, no limits. By ctypes, no other package."""
import ctypes
import ctypes.util
import pathlib
import socket

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


# ---- CURVE by hand (rfc.zeromq.org/spec/26): libzmq itself sends no part before it has the last one

S = ctypes.CDLL(ctypes.util.find_library("sodium") or "libsodium.so.23")


def _box(data, nonce, public, secret):
    out = ctypes.create_string_buffer(len(data) + 16)
    S.crypto_box_easy(out, data, ctypes.c_ulonglong(len(data)), nonce, public, secret)
    return out.raw


def _unbox(data, nonce, public, secret):
    out = ctypes.create_string_buffer(len(data) - 16)
    if S.crypto_box_open_easy(out, data, ctypes.c_ulonglong(len(data)), nonce, public, secret) != 0:
        raise ConnectionError("the box does not open")
    return out.raw


class RawDealer:
    """One connection, authenticated with this key, that says whatever frames it likes."""

    def __init__(self, port, server_key, key):
        self.tcp = socket.create_connection(("127.0.0.1", port))
        self.tcp.settimeout(3)
        self.count = 2
        self.tcp.sendall(b"\xff" + bytes(7) + b"\x01\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") +
                         bytes(32))
        self._take(64)
        public, self.secret = new_key()
        short = (1).to_bytes(8, "big")
        self._command(b"\x05HELLO\x01\x00" + bytes(72) + public + short +
                      _box(bytes(64), b"CurveZMQHELLO---" + short, server_key, self.secret))
        welcome = self._frame()[8:]
        opened = _unbox(welcome[16:], b"WELCOME-" + welcome[:16], server_key, self.secret)
        self.peer, cookie = opened[:32], opened[32:]
        vouch = bytes(range(16))
        inner = key[0] + vouch + _box(public + server_key, b"VOUCH---" + vouch, self.peer, key[1])
        inner += b"\x0bSocket-Type" + (6).to_bytes(4, "big") + b"DEALER"
        short = (2).to_bytes(8, "big")
        self._command(b"\x08INITIATE" + cookie + short +
                      _box(inner, b"CurveZMQINITIATE" + short, self.peer, self.secret))
        if not self._frame().startswith(b"\x05READY"):
            raise ConnectionError("refused")

    def _take(self, size):
        data = b""
        while len(data) < size:
            got = self.tcp.recv(size - len(data))
            if not got:
                raise ConnectionError("closed")
            data += got
        return data

    def _frame(self):
        flags = self._take(1)[0]
        return self._take(int.from_bytes(self._take(8 if flags & 2 else 1), "big"))

    def _command(self, body):
        self.tcp.sendall(b"\x06" + len(body).to_bytes(8, "big") + body)

    def send(self, data, more=False):
        self.count += 1
        short = self.count.to_bytes(8, "big")
        body = b"\x07MESSAGE" + short + _box((b"\x01" if more else b"\x00") + data,
                                             b"CurveZMQMESSAGEC" + short, self.peer, self.secret)
        self.tcp.sendall(b"\x02" + len(body).to_bytes(8, "big") + body)

    def close(self):
        self.tcp.close()
