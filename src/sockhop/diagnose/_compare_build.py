"""Builds `sockhop.diagnose._compare`: compares the keys of a map with the sockets that it holds.

A map may have 65,536 entries, and an audit should not be what loads a node.
"""

from cffi import FFI

CDEF = """
/* `what` a field of a key says, where it stands in the key, and where the same stands in a struct
 * audit_socket. `little`: a port in little-endian order.
 */
enum { ADDRESS, PORT, COOKIE };
struct key_field { int what; int at; int size; int little; int socket_at; };

/* Puts one byte for each of `count` entries (a struct audit_socket, and `key_at` bytes later the
 * key) into `states`. `protocol_at` and `state_at` tell where these stand.
 */
enum { DIFFERS, LIVE, FITS_CLOSED, DIFFERS_CLOSED };
void compare_keys(const char *entries, size_t count, size_t size, size_t key_at,
                  const struct key_field *fields, int field_count, int protocol_at, int state_at,
                  unsigned char *states);

/* The address that 4 or 16 bytes of a key say, IPv4 mapped. */
void key_address(const unsigned char *raw, int size, unsigned char *address);
/* The port that 2 or 4 bytes of a key say; one above 65535 is none. */
uint32_t key_port(const unsigned char *raw, int size, int little);
"""

SOURCE = r"""
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { ADDRESS, PORT, COOKIE };
enum { DIFFERS, LIVE, FITS_CLOSED, DIFFERS_CLOSED };
struct key_field { int what; int at; int size; int little; int socket_at; };

static bool is_zero(const unsigned char *from, int size)
{
    while (size && !*from)
        from++, size--;
    return !size;
}

static void key_address(const unsigned char *raw, int size, unsigned char *address)
{
    const unsigned char *four = NULL;

    /* In 16 bytes IPv4 stands first, last, or is mapped. Of ::/96 only ::1 is in use, and in
     * 0.0.0.0/8 there are no hosts (RFC 4291, RFC 1122).
     */
    if (size == 4 || is_zero(raw + 4, 12))
        four = raw;
    else if (is_zero(raw, 12) && raw[12])
        four = raw + 12;
    if (!four) {
        memcpy(address, raw, 16);
        return;
    }
    memset(address, 0, 10);
    memset(address + 10, 0xff, 2);
    memcpy(address + 12, four, 4);
}

static uint32_t key_port(const unsigned char *raw, int size, int little)
{
    uint32_t port = 0;

    for (int i = 0; i < size; i++)
        port = port << 8 | raw[little ? size - 1 - i : i];
    /* htons() in a wider field stands in its first half on a little-endian machine. */
    if (!little && size == 4 && !(port & 0xffff))
        port >>= 16;
    return port;
}

static bool fits(const unsigned char *socket, const unsigned char *key,
                 const struct key_field *field)
{
    const unsigned char *raw = key + field->at, *there = socket + field->socket_at;
    unsigned char address[16];
    uint16_t port;

    switch (field->what) {
    case ADDRESS:
        key_address(raw, field->size, address);
        return !memcmp(address, there, 16);
    case PORT:
        memcpy(&port, there, sizeof(port));
        return key_port(raw, field->size, field->little) == port;
    default:
        return !memcmp(raw, there, field->size);
    }
}

static void compare_keys(const char *entries, size_t count, size_t size, size_t key_at,
                         const struct key_field *fields, int field_count, int protocol_at,
                         int state_at, unsigned char *states)
{
    for (size_t n = 0; n < count; n++) {
        const unsigned char *socket = (const unsigned char *)entries + n * size;
        bool same = true, closed;
        uint16_t protocol;

        for (int i = 0; same && i < field_count; i++)
            same = fits(socket, socket + key_at, &fields[i]);
        memcpy(&protocol, socket + protocol_at, sizeof(protocol));
        closed = protocol == 6 && socket[state_at] == 7; /* IPPROTO_TCP, TCP_CLOSE */
        states[n] = closed ? (same ? FITS_CLOSED : DIFFERS_CLOSED) : same ? LIVE : DIFFERS;
    }
}
"""

ffibuilder = FFI()
ffibuilder.cdef(CDEF)
ffibuilder.set_source("sockhop.diagnose._compare", SOURCE)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
